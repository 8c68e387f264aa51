"""Choose samples: what a dataset may keep by the text of its questions and answers, and by how often a model was right."""
