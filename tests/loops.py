"""Training loops of a task's own, as a user writes them: what several tests add to their task files."""

PLAIN = """
def train(model, loader, context):
    while not context.done:
        for x, y in loader:
            context.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            context.optimizer.step()
            context.step(loss)
"""

WITH_TERMS = PLAIN.replace("loss.backward()\n", "loss.backward()\n            context.add_terms()\n")
