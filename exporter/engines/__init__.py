"""What runs a model: engines and how they are built, runners, decoders, and archives to ship."""
