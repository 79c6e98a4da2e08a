"""Images that lie in files of many samples: Hugging Face datasets, WebDataset tars, Parquet."""
