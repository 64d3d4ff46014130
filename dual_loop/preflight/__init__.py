"""What can be known before a run: is the machine fit, is the data sound, what will the model really see."""
