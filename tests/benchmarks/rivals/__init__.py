"""Published ways of cutting a model's depth, a file each, made anew from their papers."""
