"""Text generation engines."""
