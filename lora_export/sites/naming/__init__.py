"""Names of parameters: what they tell, and how they are changed."""
