"""What is decided, and what it costs: plain data that needs neither torch nor a model.

spec         `TensorSpec`: the decision for one tensor; `Site`: where the tensor lies
quant_plan   `QuantPlan`: a decision for every site
cost         `CostModel`: bit operations and bytes of a plan
budget       how a limit on bit operations is written
"""
