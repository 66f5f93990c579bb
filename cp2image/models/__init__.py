"""Networks and losses. Pure torch: no Ray, MLflow or pandas is imported on the way."""
