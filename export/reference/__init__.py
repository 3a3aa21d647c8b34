"""The small trained models shipped with the package, and how they were trained."""
