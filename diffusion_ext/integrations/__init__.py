"""Drop-in replacements for other libraries' parts; each module imports its library itself."""
