"""The commands of ``dual-loop`` beside training and export, one module each: arguments in, files and lines out."""
