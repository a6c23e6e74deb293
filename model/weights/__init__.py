"""Reading weights of other code and our own without executing pickles."""
