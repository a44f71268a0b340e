"""The checkpoint engine without a supervisor: what ``resilience.Checkpointer`` is made of. Imports no Ray."""
