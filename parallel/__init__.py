"""Process groups, the CPU stand-in for torch.cuda, and the layout of the parallel axes."""
