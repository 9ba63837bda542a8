"""What is watched while a policy learns from its own answers: figures, stop rules, signs of reward hacking."""
