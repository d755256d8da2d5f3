"""Where images come from: folders, parquet files, tar files, the Hub, streams, and mixtures of them."""
