"""Tables and pictures of results. Reads rows of results.jsonl; knows nothing of how they were computed."""
