"""Load a registered model in an environment without m2f: `load_registered.py ADDRESS IMAGE EXAMPLE` prints JSON.

The environment has only the packages that the model requires. m2f is imported from the wheel inside the model.
"""

import base64
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path

UNWANTED = ("m2f", "ray", "deepspeed", "webdataset", "boto3", "botocore", "psutil", "pytest")
present = [name for name in UNWANTED if importlib.util.find_spec(name) is not None]
warnings.simplefilter("ignore")

import mlflow.pyfunc  # noqa: E402
import numpy as np  # noqa: E402
from mlflow.pyfunc import scoring_server  # noqa: E402

address, image = sys.argv[1], Path(sys.argv[2]).read_bytes()
model = mlflow.pyfunc.load_model(address)
seconds, responses = [], []
for _ in range(3):
    started = time.process_time()
    responses.append(model.predict({"image": [image]})[0])
    seconds.append(time.process_time() - started)

import cv2  # noqa: E402

import m2f  # noqa: E402

pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def serve(body):
    schema = model.metadata.get_input_schema()
    served = scoring_server.invocations(json.dumps(body), "application/json", model, schema)
    return json.loads(served.response)["predictions"]


def error_message(value):
    try:
        model.predict({"image": [value]})
    except mlflow.exceptions.MlflowException as error:
        return str(error)
    return ""


text = base64.b64encode(image).decode()
served = serve({"inputs": {"image": [text, text]}, "params": {"task": "panoptic"}})
served += serve({"dataframe_records": [{"image": pixels.tolist()}], "params": {"task": "panoptic"}})
json.dump(
    {
        "present": present,
        "program": m2f.__file__,
        "cpu_s": seconds,
        "response": responses[0],
        "same": responses[0] == responses[1] == responses[2] == model.predict({"image": [pixels]})[0],
        "served": [
            one["panoptic"] == responses[0]["panoptic"] and set(one) == {"height", "width", "panoptic"}
            for one in served
        ],
        "all_instances": len(model.predict({"image": [image]}, params={"thresholds": False})[0]["instances"]),
        "refused": [
            error_message(one) for one in ("/etc/passwd", "http://127.0.0.1/x.png", b"no image", np.zeros((4, 4), int))
        ],
        "example": sorted(serve(json.loads(Path(sys.argv[3]).read_text()))[0]),
        "metadata": model.metadata.metadata["task"],
    },
    sys.stdout,
)
