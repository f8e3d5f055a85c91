"""A chat with what plain protoc makes of the committed proto, and nothing of Vivace's.

python -I -S plain_stub.py GENERATED_FOLDER TARGET QUESTION PACKAGES_FOLDER
"""

import json
import sys
from importlib.util import find_spec

generated, target, question, packages = sys.argv[1:]
sys.path += [generated, packages]  # no site, so that nothing else that is installed there gets in

import grpc  # noqa: E402

from vivace.v1 import inference_pb2, inference_pb2_grpc  # noqa: E402

with grpc.insecure_channel(target) as channel:
    request = inference_pb2.ChatRequest(
        messages=[{"role": "user", "content": question}], sampling={"temperature": 0}
    )
    replies = list(inference_pb2_grpc.InferenceStub(channel).Chat(request))
told = {
    "texts": [reply.text for reply in replies],
    "reason": replies[-1].finish.reason,
    "vivace": list(sys.modules["vivace"].__path__),
    "has_client": find_spec("vivace.serving") is not None,
}
print(json.dumps(told))
