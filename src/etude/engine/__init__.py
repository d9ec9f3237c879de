"""How it is computed: training, scoring, generating, budgets and costs."""
