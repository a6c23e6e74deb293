"""What is found out and decided about a run before its first rank starts."""
