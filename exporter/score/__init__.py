"""How redundant each attention, MLP and block is: a model and a text to an importance report."""
