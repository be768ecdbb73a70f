"""A model for the campaign: reads its parameters, writes one number."""

import json
import math
import sys

with open(sys.argv[1]) as file:
    given = json.load(file)
with open("output.json", "w") as file:
    json.dump({"height": given["speed"] * math.sin(given["angle"]) ** 2}, file)
