// Run a folder of msn-export hub in a pipeline of transformers.js, as its users do: nothing is
// fetched. Arguments: the folder, the work folder, the task, transformers.js' name of the dtype.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, work, task, dtype] = process.argv.slice(2);
const require = createRequire(path.join(process.cwd(), "package.json"));
const library = await import(pathToFileURL(require.resolve("@huggingface/transformers")).href);
const { pipeline, RawImage, env } = library.default ?? library;
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const { pictures } = JSON.parse(fs.readFileSync(path.join(work, "input.json"), "utf8"));
const run = await pipeline(task, path.basename(folder), { dtype, device: "cpu" });
const images = await Promise.all(pictures.map((picture) => RawImage.read(picture)));
const outputs = {};
if (task === "image-classification") {
  // the pipeline gives labels with scores in order; the model behind it gives the logits
  const { logits } = await run.model(await run.processor(images));
  outputs.logits = { shape: logits.dims, values: Array.from(logits.data, Number) };
  const count = logits.dims[1];
  const labels = Object.values(run.model.config.id2label);
  const scores = [];
  for (const image of images) {
    const found = await run(image, { top_k: count });
    for (const label of labels) scores.push(found.find((one) => one.label === label).score);
  }
  outputs.scores = { shape: [images.length, count], values: scores };
} else {
  const features = await run(images);
  outputs.last_hidden_state = { shape: features.dims, values: Array.from(features.data, Number) };
}
fs.writeFileSync(path.join(work, "outputs.json"), JSON.stringify(outputs));
process.exit(0);
