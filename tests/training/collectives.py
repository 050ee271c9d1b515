"""Which collectives of a compiled program cross the stages of a pipeline."""

import math
import re

import numpy as np

# replica_groups={{0,1},{2,3}}, =[2,4]<=[4,2]T(1,0) or =mesh['axis_0'=2,...] {'axis_0'}; source_target_pairs={{0,4},{4,0}}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\((.*)")


def crossing(text, num_devices, stages):
    """(kind, shapes of the result) of each collective whose devices are not all of one stage; stages are the outermost mesh axis."""
    found = []
    for shapes, name, rest in COLLECTIVE.findall(text):
        groups = [[*map(int, group.split(","))] for group in re.findall(r"\{([\d,]+)\}", rest.split("metadata=")[0])]
        iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
        named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", rest)
        if iota:
            shape, dims, order = ([*map(int, part.split(","))] if part else None for part in iota.groups())
            groups = np.arange(num_devices).reshape(dims).transpose(order).reshape(shape).tolist()
        elif named:
            sizes, dims, order, axes = named.groups()
            sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
            dims, order = ([*map(int, part.split(","))] if part else None for part in (dims, order))
            ids = np.arange(num_devices).reshape(dims or [-1]).transpose(order).reshape(list(sizes.values()))
            over = [[*sizes].index(axis) for axis in re.findall(r"'(\w+)'", axes)]
            groups = np.moveaxis(ids, over, range(-len(over), 0)).reshape(-1, math.prod(ids.shape[axis] for axis in over)).tolist()
        assert groups, rest
        if any(len({device * stages // num_devices for device in group}) > 1 for group in groups):
            found.append((name, [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", shapes)]))
    return found
