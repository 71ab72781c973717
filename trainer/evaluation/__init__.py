"""What a trained model can do, beyond its loss: tables and plots in ``RUN/eval/``."""
