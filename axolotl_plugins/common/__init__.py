"""What every package here shares: files, command lines and tokenizers."""
