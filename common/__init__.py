"""Ground floor of all folders: errors, files, names from elsewhere, text on the screen. Nothing here imports torch."""
