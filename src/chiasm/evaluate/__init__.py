"""Results and truth to scores, figures and pages."""
