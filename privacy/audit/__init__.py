"""Attacks on our own mechanisms, which end in a lower bound of ε. They take callbacks: they know no federation."""
