"""A stand-in for the model llm: answers with the words of its input or messages, and starts a process like the engine.

The setting ``revision`` chooses how it misbehaves: ``broken`` fails to load, ``slow`` takes 60 s to load. The
prompt ``wait`` is answered after 60 s, and ``setting NAME`` with the value of that setting.
"""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.settings = json.loads(args["model_config"])["parameters"]
        how = self.settings.get("revision", {}).get("string_value")
        self.engine = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, stdin=subprocess.DEVNULL
        )
        if how == "broken":
            raise pb_utils.TritonModelException("[NOT_FOUND] model: 'no/such' is not there;\nlook again")
        if how == "slow":
            time.sleep(60)

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request,), daemon=True).start()

    def answer(self, request):
        text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0].decode()
        sender = request.get_response_sender()
        text = text or json.loads(request.parameters())["messages"]
        pieces = [word + " " for word in text.split()]
        if text == "wait":
            time.sleep(60)
        elif text.startswith("setting "):
            pieces = [self.settings[pieces[1].strip()]["string_value"]]
        for piece in pieces:
            tensor = pb_utils.Tensor("text_output", np.array([[piece]], dtype=object))
            sender.send(pb_utils.InferenceResponse([tensor]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
