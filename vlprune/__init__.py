"""vlprune: structured pruning for vision-language transformers. Removes weights, not tokens.

The verbs: create_model, dissect, score, plan, mask, prune, repair, compress, verify,
profile, save_pretrained, from_pretrained, certify, verify_folder, to_plain, to_onnx,
to_torch_export (`vlprune.hub`: push_to_hub). The nouns: Anatomy, Scores, Plan, LatencyTable,
Gates. Plug-ins: `vlprune.metrics`, `vlprune.strategies`, `vlprune.allocation`,
`vlprune.families`, `vlprune.tasks`.
"""

from vlprune import metrics as metrics
from vlprune import tasks as tasks
from vlprune.anatomy import Anatomy as Anatomy
from vlprune.anatomy import Axis as Axis
from vlprune.certificate import Certificate as Certificate
from vlprune.certify import certify as certify
from vlprune.certify import verify_folder as verify_folder
from vlprune.contracts import Allocation as Allocation
from vlprune.contracts import Metric as Metric
from vlprune.contracts import Strategy as Strategy
from vlprune.contracts import Task as Task
from vlprune.cost import price as price
from vlprune.dissect import dissect as dissect
from vlprune.export import to_onnx as to_onnx
from vlprune.export import to_torch_export as to_torch_export
from vlprune.gates import Gates as Gates
from vlprune.pipeline import compress as compress
from vlprune.pipeline import create_model as create_model
from vlprune.pipeline import mask as mask
from vlprune.pipeline import plan as plan
from vlprune.pipeline import prune as prune
from vlprune.pipeline import score as score
from vlprune.pipeline import verify as verify
from vlprune.plain import plain_plan as plain_plan
from vlprune.plain import to_plain as to_plain
from vlprune.plan import Cost as Cost
from vlprune.plan import Plan as Plan
from vlprune.plan import Scores as Scores
from vlprune.plan import make_plan as make_plan
from vlprune.profile import profile as profile
from vlprune.pruner import DependencyGraphPruner as DependencyGraphPruner
from vlprune.recover.repair import repair as repair
from vlprune.store import from_pretrained as from_pretrained
from vlprune.store import save_pretrained as save_pretrained
from vlprune.timetable import LatencyTable as LatencyTable
