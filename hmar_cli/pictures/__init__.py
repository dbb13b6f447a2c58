"""Pictures of any size and kind: what of them is edited, where a model looks, and how its result is put back."""
