"""A plan carried out on a Hugging Face model: a folder that is smaller by what was dropped."""
