"""nbconvert preprocessor of `make notebooks`: images are stored as PNG, without the JPEG that Pillow adds."""

from nbconvert.preprocessors import Preprocessor


class PNGOnly(Preprocessor):
    def preprocess_cell(self, cell, resources, index):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"] = {"image/png": output["data"]["image/png"], "text/plain": "<image>"}
        return cell, resources
