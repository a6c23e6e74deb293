"""Reading of weights, those of this project and of others, without executing pickles."""
