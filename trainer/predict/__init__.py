"""What a recipe will take, computed without building its model."""
