"""What an adapter goes into: facts about a base that its tensors' names and shapes alone don't tell."""
