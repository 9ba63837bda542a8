"""What makes an answer good: reward models, rules, metrics, functions and endpoints, combined by weight."""
