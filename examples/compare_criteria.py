"""Compare criteria on one model: equal parameters, the same examples, intervals, one page."""

import sys
import tempfile

import vlprune
from vlprune.compare import compare, write_page
from vlprune.tasks import Classification
from vlprune.tasks.scenes import classification_loader

# For real weights: create_model("timm:deit_small_patch16_224", pretrained=True) and your loaders
model = vlprune.create_model("scenes-deit")
task = Classification(classification_loader("train", 64, 1, 32))
test = Classification(classification_loader("test", 200, 1, 50))

found = compare(
    model,
    task,
    test,
    metrics=("taylor", "magnitude", "random"),
    keeps=(0.5,),
    repaired=False,  # True adds what repair makes of each
    name="scenes-deit",
)
print(f"dense {found.dense.value:.1f} %")
for point in found.points:
    print(f"{point.label:<20} {point.value:5.1f} % ({point.low:.1f} to {point.high:.1f})")
for pair in found.differences:
    first, second = found.points[pair.first].label, found.points[pair.second].label
    said = "differs from" if pair.is_beyond_noise else "cannot be told from"
    print(f"{first} {said} {second}: {pair.difference:+.1f}")

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
write_page(found, folder)
print(f"page: {folder}/index.html")
