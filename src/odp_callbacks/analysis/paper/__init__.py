"""The protocol of arXiv:2605.10889 ("Unmasking On-Policy Distillation", Armandpour et al., 2026) as pure functions.

Its score is a cosine on the student's *logits*, over the tokens that were visited often enough at a node. It is not
the alignment on the LoRA parameters, which the rest of this package measures and which is ours.

**A warning about names.** The paper calls KL(student‖teacher) "forward KL". Everybody else, and this package, calls it
*reverse* KL.

In the order in which the protocol uses them:

- :mod:`~odp_callbacks.analysis.paper.representative_paths`: the two correct and two incorrect paths of a question;
- :mod:`~odp_callbacks.analysis.paper.depth_windows`: which positions of a path are enriched;
- :mod:`~odp_callbacks.analysis.paper.enrichment`: which tokens, and by how many targeted rollouts;
- :mod:`~odp_callbacks.analysis.paper.prefix_tree`: visits and successes;
- :mod:`~odp_callbacks.analysis.paper.node_score`: the score of a node;
- :mod:`~odp_callbacks.analysis.paper.records`: what is kept of a measurement;
- :mod:`~odp_callbacks.analysis.paper.scored_nodes`: the scores of all nodes of a record;
- :mod:`~odp_callbacks.analysis.paper.aggregates`: means over paths, questions and teachers;
- :mod:`~odp_callbacks.analysis.paper.predictor_correlations`, :mod:`~odp_callbacks.analysis.paper.oracle_filter`,
  :mod:`~odp_callbacks.analysis.paper.difficulty`: its other figures;
- :mod:`~odp_callbacks.analysis.paper.biases`: two biases of the protocol, derived by us.
"""
