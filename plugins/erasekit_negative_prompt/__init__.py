"""The negative prompt: classifier-free guidance away from the concept in place of from nothing."""
