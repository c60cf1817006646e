"""The rules, by what they ask. Each is a function of what was read; None where it does not apply."""
