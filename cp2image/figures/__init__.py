"""Pure: numpy, pyarrow, pandas, scikit-image; no Ray, MLflow or network."""
