"""How much, where and when to prune; cutting tensors."""
