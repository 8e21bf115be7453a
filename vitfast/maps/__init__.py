"""What a Vision Transformer attends to: probabilities per layer, rollouts, and pictures of them."""
