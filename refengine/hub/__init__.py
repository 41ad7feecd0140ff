"""Models on the Hugging Face hub: how they are named, and their files in the local cache."""
