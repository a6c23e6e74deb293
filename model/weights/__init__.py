"""Read weights of this project and of others without executing pickles."""
