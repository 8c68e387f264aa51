"""What every folder stands on: errors, files, names from elsewhere, text on the screen. Nothing here imports torch."""
