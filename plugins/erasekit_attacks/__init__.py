"""Attacks on erased concepts, and probes of what prompts do not reach."""
