"""The words of the shelves. Every list was written for this project and contains no word twice."""

KINDS = """
    amber barley blue brass bright broken brown carved cedar cherry chipped clay copper cotton crooked damp dotted
    dusty empty faded folded forest garden gilded glass golden grey hazel heavy hollow honey humble iron ivory lemon
    linen little maple mended misty narrow oak olive painted pale patched pewter pine plain polished purple quiet
    red river rough round rusty saffron salted sandy silver smoky spare speckled spotted square steel striped tall
    thick timber velvet violet walnut warm white wicker willow winter wooden yellow
""".split()  # noqa: SIM905 - a list of one word a line is longer than this file

DISHES = """
    bread broth cake casserole chowder cobbler crumble curry custard dumpling flatbread gratin hash jam loaf strudel
    omelette pancake pasta pickle pie porridge pudding ragout relish risotto roast salad sauce soup stew tart
""".split()  # noqa: SIM905 - a list of one word a line is longer than this file

THINGS = """
    anchor basket bell bicycle boiler bucket button cabinet candle cart chain chair clock compass cradle drum engine
    fan flute fountain furnace gate hammer heater hinge kettle ladder lamp lantern lever lock loom mirror oven pipe
    plough pump radio rudder saddle scale shutter sieve spindle stove switch telescope toolbox trumpet valve wagon
    whistle
""".split()  # noqa: SIM905 - a list of one word a line is longer than this file

NAMES = """
    Ada Agnes Alma Anton Arlo Astrid Basil Bela Boris Bruno Carla Cleo Cyril Dario Delia Dora Edgar Edith Elsa Emil
    Enzo Esther Fabian Felix Fiona Flora Frida Gideon Greta Gustav Hanna Hazel Hector Hugo Ida Igor Ines Iris Ivan
    Jasper Joan Jonas Judith Karl Kira Klara Lars Lena Leo Lorna Lotte Ludwig Magda Marta Max Mina Mona Nadia Nils
    Nora Olga Oscar Otto Pavel Petra Philip Rosa Rufus Ruth Samuel Selma Silas Sonja Stella Sven Tessa Tilda Tomas
    Ursula Vera Viktor Wanda Wilma Xenia Yara Yusuf Zelda Zora
""".split()  # noqa: SIM905 - a list of one word a line is longer than this file

PLACES = """
    attic barn bakery balcony bathhouse cellar chapel closet corridor courtyard cupboard dairy drawer garage granary
    greenhouse hallway harbour hayloft kitchen laundry library lighthouse lobby market mill museum nursery office
    orchard pantry parlour pavilion porch quarry school shed stable station studio tavern theatre tower trunk vault
    veranda vestry warehouse wardrobe washroom watchtower workshop
""".split()  # noqa: SIM905 - a list of one word a line is longer than this file

SIDES = """
    almonds apples basil beans beetroot berries butter cabbage capers carrots celery cheese chestnuts chives cream
    currants dates dill fennel figs garlic ginger grapes herbs kale leeks lentils lettuce mint mushrooms mustard
    nutmeg nuts onions parsley peaches pears peas pepper plums potatoes pumpkin radish raisins rice sage spinach
    thyme toast tomatoes turnips vinegar walnuts yoghurt
""".split()  # noqa: SIM905 - a list of one word a line is longer than this file

DAYS = """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""".split()  # noqa: SIM905 - a list of one word a line is longer than this file

NUMBERS = [str(n) for n in range(2, 100)]
