// The widgets inside a dynamic combo bring their tooltip from the node's definition, which is English, and it goes before
// the translation. Without it, the translation is shown.
import { app } from "../../scripts/app.js"

const COMBOS = { ApplySpargeAttn: "selection", SpargeAttnBenchmark: "shape" }
const TRANSLATED = ["zh", "zh-TW"]

app.registerExtension({
  name: "SpargeAttn.tooltips",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const combo = COMBOS[nodeData.name]
    if (!combo || !TRANSLATED.includes(app.extensionManager.setting.get("Comfy.Locale"))) return
    for (const option of { ...nodeData.input.required, ...nodeData.input.optional }[combo][1].options)
      for (const inputs of Object.values(option.inputs))
        for (const input of Object.values(inputs)) delete input[1]?.tooltip
  }
})
