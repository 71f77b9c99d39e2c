"""What can be packed, a module a kind."""
