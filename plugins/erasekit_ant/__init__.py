"""ANT, which turns the guidance away from a concept in the late part of the trajectory (ACM MM 2025)."""
